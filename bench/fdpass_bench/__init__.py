"""The fdpass-bench command: it uses fdpass as any program would, and shows with real connections what each strategy does."""
