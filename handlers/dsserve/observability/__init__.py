"""What watches rank 0's engine from outside: metrics, their server, traces."""
