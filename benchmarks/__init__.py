"""How fast kernels and converter are, how much memory and disk they take, beside llama.cpp's own. Run by `make bench`.

The converter is measured in child processes, one a step, the kernels in this one; and nothing is believed: what both
sides make is compared, and a difference fails the run. No part of the program imports this.
"""
