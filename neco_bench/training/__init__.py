"""NeCo post-training (Pariza et al., "Near, far", ICLR 2025).

`loop.train` runs a `recipe.Recipe`. From the image to the loss: `images` and `batches` (reading and order), `views`
(crops, colours, boxes), `networks` (student and teacher), `regions` (overlap of views), `neco` or `mim` (the
objective), `sorting` and `loss`. `trainer` does one step, and `loop` a whole run, whose files `record`, `checkpoints`
and `log` write.
"""
