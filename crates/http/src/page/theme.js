"use strict";
// The page's theme: the system's, or the one that was chosen here. Runs before anything is drawn, so that nothing flashes.
{
  const THEMES = ["auto", "light", "dark"];
  const root = document.documentElement;
  const show = theme => {
    root.dataset.theme = theme;
    const button = document.getElementById("theme");
    if (button) button.lastElementChild.textContent = theme;
  };
  // A browser may refuse to keep anything; then a choice lasts as long as the page.
  const kept = () => { try { return localStorage.getItem("theme"); } catch { return null; } };
  const keep = theme => { try { localStorage.setItem("theme", theme); } catch { return; } };

  show(THEMES.includes(kept()) ? kept() : "auto");
  addEventListener("DOMContentLoaded", () => {
    show(root.dataset.theme);
    document.getElementById("theme").addEventListener("click", () => {
      const next = THEMES[(THEMES.indexOf(root.dataset.theme) + 1) % THEMES.length];
      keep(next);
      show(next);
    });
  });
}
