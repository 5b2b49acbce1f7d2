"""chatfold's proxy: speaks HTTP, runs the models."""
