"""NeCo post-training (Pariza et al., ICLR 2025): views, soft sorting, loss."""
