"""Which layers are critical (eq. 2 and 3), and which are chosen."""
