"""One module a verb of the command line: its arguments and what it prints. The work is done in quant and runtime."""
