"""Which layers a network has, and in what order; their features; freezing the others."""
