"""Every claim about the methods, proven or compared: `python -m rlhf_lib proofs`.

By enumeration, on a policy whose responses can all be listed; and against TRL, on the same tensors.
"""
