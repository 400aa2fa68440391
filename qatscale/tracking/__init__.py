"""What a run leaves behind: its folder (always), MLflow (when it answers), tables and figures made from both."""
