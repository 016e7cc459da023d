"""A trained policy as a robot, a simulator sweep or a server sees it: raw observations in, raw action chunks out."""
