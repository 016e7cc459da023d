"""Studies: questions that a command answers with a figure, tables and a paragraph. One file each, and what they share."""
