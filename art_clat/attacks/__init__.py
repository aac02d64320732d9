"""Balls, projected gradient ascent, an ART attack in tensors."""
