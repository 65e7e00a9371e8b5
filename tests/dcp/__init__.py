"""Many ranks in processes of their own, on gloo: see ranks.py."""
