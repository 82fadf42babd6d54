"""Everything that is measured; results/ has what came of it."""
