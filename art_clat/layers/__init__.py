"""Which layers a network has, in what order; their features; freezing."""
