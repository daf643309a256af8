"""What one sees of a run while it trains: grids of images, held-out scores, the model card."""
