"""Full fine-tuning: the encoder and a decoder, end to end."""
