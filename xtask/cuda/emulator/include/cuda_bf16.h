// Stands in front of the toolkit's header of this name.
#pragma once
#include "emulator/narrow.hpp"
