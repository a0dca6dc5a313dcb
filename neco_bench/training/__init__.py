"""NeCo post-training (Pariza et al., "Near, far", ICLR 2025).

`loop.train` runs a `recipe.Recipe`. From the image to the loss: `images` and `batches` (what is read, in which order),
`views` (crops, colours, boxes), `networks` (student and teacher), `regions` (where views overlap), `neco` or `mim` (the
objective), `sorting` and `loss`. `trainer` does a step; `loop` does a run, of which `record`, `checkpoints` and `log`
write the files.
"""
