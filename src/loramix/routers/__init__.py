"""What makes scalings: routers, from hidden states to logits, and gatings, from logits to scalings."""
