"""How bytes become pixels: the rule, its parts, and the sample that it is measured on."""
