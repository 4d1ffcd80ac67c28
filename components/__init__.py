"""One Kubeflow component a file: a typed signature and a few lines that call teefusion.

No ``from __future__ import annotations`` here: kfp 2.17 reads annotations as objects and fails to compile with it.
"""
