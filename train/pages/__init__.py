"""The pages of `python train/studio.py`: pictures and captions, plan and start, watch, compare, try, take away.

They start the commands that a shell starts and read the files that these write; there is no other state. Begin with
app.py (requests and who may send them), workspace.py (which folders), and queue.py (commands, one after the other).
Each page is a module with a `router` and a template of its name. May import all packages of train/.
"""
