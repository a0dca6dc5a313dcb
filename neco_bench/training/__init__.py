"""NeCo post-training (Pariza et al., "Near, far", ICLR 2025).

`loop.train` runs a `recipe.Recipe`. From the image to the loss: `images` and `batches` (what is read, in which order),
`views` (crops, colours, boxes), `networks` (student and teacher), `align` (shared regions), `objectives` (what is
compared), `sorting` and `loss`. `checkpoints` keeps a run.
"""
