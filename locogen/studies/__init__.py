"""Many runs from one TOML file: planned, executed by papermill, resumed."""
