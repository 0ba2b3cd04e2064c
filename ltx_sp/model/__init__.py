"""LTX-2 mathematics on the tensors it is given: no ranks, no files, no environment."""
