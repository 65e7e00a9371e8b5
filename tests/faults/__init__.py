"""What happens to a save when the system fails, kills or surprises it; docs/reliability.md tells what is promised.

The modules named ``*_process`` run in processes of their own, most of them under preload.c.
"""
