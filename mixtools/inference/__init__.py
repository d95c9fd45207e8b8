"""Running a Mixtral: in memory, or a layer at a time from any Reader."""
