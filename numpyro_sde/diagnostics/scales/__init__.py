"""At which time scales a model and its data agree."""
