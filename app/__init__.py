"""The command line and the pages of the dashboard."""
