"""Scripts to run, read and copy; installed as `dmt_convert.recipes`."""
