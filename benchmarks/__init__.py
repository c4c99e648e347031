"""This library against what people would use instead: same rows, model, batch, precision, machine.

`make bench` runs the comparison. Nothing in `rlhf_lib` needs this folder.
"""
