"""A run of fit as one plain PyTorch script: what it is made of is looked at in writer.py, and read in template.py."""

from fitkit.script.writer import write_script

__all__ = ["write_script"]
