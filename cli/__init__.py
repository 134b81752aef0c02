"""The `dmt` command line; installed as `dmt_convert.cli`."""
