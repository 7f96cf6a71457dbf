"""The torch side: blocks and what is tapped or changed in them, the gated executor, gradients, several processes."""
