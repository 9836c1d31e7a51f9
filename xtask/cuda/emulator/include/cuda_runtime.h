// Stands in front of the toolkit's header of this name: emulator.hpp has everything already.
#pragma once
