"""Pictures of what a run did: sample grids, learning curves, critical tokens."""
