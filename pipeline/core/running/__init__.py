"""What starts, checks and ends stages: the flow, workspaces and servers. No stage imports any of it."""
