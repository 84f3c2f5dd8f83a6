// Checks of the arguments that cross from Python. std::invalid_argument becomes ValueError.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>

namespace longvita {

inline std::string text(const char* x) { return x; }
inline std::string text(const std::string& x) { return x; }
inline std::string text(int64_t x) { return std::to_string(x); }

// The message is the parts in a row; it is put together only when it is needed.
template <class... Parts>
void check(bool ok, const Parts&... parts) {
  if (!ok) throw std::invalid_argument((text(parts) + ...));
}

}  // namespace longvita
