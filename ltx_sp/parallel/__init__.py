"""Ranks: the only users of torch.distributed."""
