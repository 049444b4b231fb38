"""What `prune` is asked for, as frozen records: data alone, which look up no method and make no engine."""
