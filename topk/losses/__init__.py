"""One loss a file, top-down: the formula, the same number made fast, the public function, the Module."""
