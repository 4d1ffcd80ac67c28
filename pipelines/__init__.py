"""The Kubeflow pipeline: define, compile, run here."""
