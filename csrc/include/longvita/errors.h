// Checks of the arguments that cross from Python. std::invalid_argument becomes ValueError.
#pragma once
#include <stdexcept>
#include <string>

namespace longvita {

inline void check(bool ok, const char* message) {
  if (!ok) throw std::invalid_argument(message);
}
inline void check(bool ok, const std::string& message) {
  if (!ok) throw std::invalid_argument(message);
}

}  // namespace longvita
