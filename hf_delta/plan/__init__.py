"""What a recipe would do, before it costs anything: `hf-delta run RECIPE --dry_run`."""
