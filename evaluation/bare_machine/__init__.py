"""What ``evaluation/gpu.py`` does: pack, and run the parts on a machine that has torch and timm and nothing else."""
