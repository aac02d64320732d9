"""Balls, projected gradient ascent, and an ART attack in tensors."""
