"""From a recipe to a run: settings, datasets, processes, and the trainer that they describe."""
