"""The three stages of training, the only LightningModules."""
