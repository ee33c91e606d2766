"""A target file for tests: small, without energies."""

SMALL = """
name = "small"
description = "a chip"
float = "bf16"
source = "made up"
[array]
units = 2
tiles = [[8, 8, 8]]
source = "made up"
[[rate]]
weights = "bf16"
activations = "bf16"
ops = 1e12
source = "made up"
[[memory]]
name = "DRAM"
bytes = 1e9
bandwidth = 1e10
source = "made up"
[vector]
ops = 1e11
source = "made up"
"""
