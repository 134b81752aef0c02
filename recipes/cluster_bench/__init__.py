"""What `bench_cluster` is made of: settings, hosts, ranks, variants, results."""
