"""Policies over a websocket: `vlatune serve`, and a robot loop that asks one."""
